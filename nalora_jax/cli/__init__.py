"""The command line: flags and subcommands."""
