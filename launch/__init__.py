"""The command line, settings, ranks and recipes: the only folder that reads files of settings or the environment."""
