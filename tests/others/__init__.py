"""Networks of six other packages, each used as its own users do: `make test-others`, in an environment of its own."""
