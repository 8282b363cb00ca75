"""Small and quick: has a change made an op slower? `make regression`."""
