"""What each family hoists out of a step and how its graphs are written."""
