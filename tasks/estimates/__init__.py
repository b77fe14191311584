"""How a step computes, by what it will take of this machine; never what: no step depends on this package."""
