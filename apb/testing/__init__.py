"""Tools for testing apb and code built on it."""
