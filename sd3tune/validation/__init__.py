"""Pictures and numbers about the adapter."""
