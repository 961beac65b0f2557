"""Pages of studies and of compressed models: charts, tables and findings in plain words."""
