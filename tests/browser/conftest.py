"""Nothing of the other tests' fixtures is needed here."""
