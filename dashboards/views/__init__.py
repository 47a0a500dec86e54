"""One module a page; each reads the URL, asks the catalog, and draws."""
