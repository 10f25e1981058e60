"""Ray: where the parts of a run live as actors, and how the driver reaches them."""
