"""Which samples come when, and how they get into memory; see docs/order.md."""
