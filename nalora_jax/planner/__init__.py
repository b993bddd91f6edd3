"""Plans: estimates, machines, compiled programs, and the choice of a layout."""
