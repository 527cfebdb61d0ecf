"""The command line: one file for each command, no heavy import before a command really runs."""
