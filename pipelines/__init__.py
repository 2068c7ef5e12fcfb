"""One readable end-to-end script a stage, composed from the library."""
