"""The studies: a file each, by name in ``study_command``, and the commands."""
