"""Integrations: our operators inside other packages' models. Each is a module of its own, imported only where it is used."""
