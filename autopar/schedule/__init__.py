"""Pipeline schedules as data, their generators, and the event simulation that times them."""
