"""Our parts behind the interfaces of other projects; each needs its own optional extra."""
