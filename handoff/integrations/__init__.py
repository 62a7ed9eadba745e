"""Web servers that are upgraded without a lost request: each module here takes one of them, and needs its package.

All follow one pattern: the server's own protocol is made for each connection that handoff's accept loop hands over, so
that pause and take-back need nothing of the server; its goodbye is said when draining begins, which is not before
commit; what is idle is closed when the grace time is over; and the application is shut down when no connection is left.
"""
