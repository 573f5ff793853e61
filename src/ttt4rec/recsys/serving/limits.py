"""What the service takes, and how long it waits."""

MAX_BODY_BYTES, MAX_EVENTS, MAX_USERS, MAX_K, MAX_ID = 1 << 20, 1000, 100, 1000, 200
"""Of a request."""
MAX_FOUND = 100
"""Items in a list of the demo's page."""
MAX_HEADER_BYTES = 1 << 16
MAX_BODIES_BYTES = 64 << 20
"""Of all requests that wait; more are answered by 503."""
GROUP_BYTES = 1 << 16
"""Of events that are logged together; about as much as a single request may ask for in time."""
MAX_WORKING = 2
"""Requests besides events; more wait, since they would only take time from each other."""
MAX_WAIT_SECONDS = 0.6
"""Then a request is answered by 503."""
MAX_CONNECTIONS = 800
"""Less than the 1,024 files that a process may often open."""
PATIENCE_SECONDS, SECOND_LOOK_SECONDS = 5.0, 0.1
"""With a client that sends no header or does not read its answer."""
BODY_SECONDS = 5.0
SNAPSHOT_SECONDS, CHECK_SECONDS = 300.0, 3600.0
