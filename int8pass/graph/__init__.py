"""What every stage stands on: constants, patterns, rewriting, contracts."""
