"""Check the installation and results, and recreate a result."""
