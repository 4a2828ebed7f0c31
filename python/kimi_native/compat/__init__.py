"""Our operators inside other libraries' models. Nothing here imports those libraries before it is called."""
