"""What a GPU that is at hand for ten minutes is asked, by one command and without a network."""
