"""What pictures there are and how they are cut. No torch here."""

from sd3tune.data.buckets import Bucket, Placement
from sd3tune.data.catalog import Catalog, Item, Problem, discover
from sd3tune.data.datasets import Dataset
from sd3tune.data.planning import Plan, plan

__all__ = ["Bucket", "Catalog", "Dataset", "Item", "Placement", "Plan", "Problem", "discover", "plan"]
