"""The command line of batude_fx. It stands beside the package so that `batude-fx --help` needs no torch."""
