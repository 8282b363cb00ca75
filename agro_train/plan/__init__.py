"""What a run would need, before anyone rents a machine for it: predictions, no measurement."""
