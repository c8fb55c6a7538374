"""The names of the option that shows help, for all commands.

A subcommand would inherit them from its group, but click keeps the option that it makes first: a
command that was once called on its own had no `-h` in the same process any more.
"""

HELP = {"help_option_names": ["-h", "--help"]}
