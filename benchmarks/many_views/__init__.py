"""What a global layer over many views of one scene keeps, and how fast it is."""
