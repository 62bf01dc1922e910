"""The stages of a study: what each does as units, and what its results say."""
