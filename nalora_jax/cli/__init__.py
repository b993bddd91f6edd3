"""The command line: flags, and what each verb does."""
