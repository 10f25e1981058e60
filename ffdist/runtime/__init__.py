"""Ray: clusters, placement, actors, and the runner that drives them. The only package that imports ray."""
