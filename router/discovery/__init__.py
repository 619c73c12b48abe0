"""Finding better models: catalogs, criteria, trials, probation."""
