"""Train what goes with a model: retaining heads, which score tokens, and adapters for long-context tasks."""
