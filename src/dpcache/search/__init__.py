"""Plans tried for real, the best one kept."""
