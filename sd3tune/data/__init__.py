"""What pictures there are and how they are cut. No torch here."""

from sd3tune.data.buckets import Bucket, Placement, Plan, plan
from sd3tune.data.catalog import Catalog, Dataset, Item, Problem, discover

__all__ = ["Bucket", "Catalog", "Dataset", "Item", "Placement", "Plan", "Problem", "discover", "plan"]
