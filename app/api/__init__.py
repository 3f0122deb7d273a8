"""HTTP: what may be asked, by whom, and how the answer looks. One file a resource."""
