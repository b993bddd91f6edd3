"""Reading and writing of model and adapter files."""
