"""Drop-in surfaces, each importing its host lazily."""
