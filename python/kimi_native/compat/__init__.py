"""Our operators behind the interfaces of other libraries. Nothing here is imported by the rest of the package, nor imports those
libraries before they are there."""
