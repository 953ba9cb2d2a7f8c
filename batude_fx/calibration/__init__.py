"""Images, the user's or procedural ones, and the statistics that a network has on them."""
