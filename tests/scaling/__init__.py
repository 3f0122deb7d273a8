"""Bursty traffic, replayed against the number of workers that the service asks for, and against the queue's length.

traffic     the scenarios: when runs come, and what each takes
cluster     workers that start late, take runs into slots, and are stopped
platform    what polls a number, and starts and stops workers by it
measured    what came of it: waits, workers stopped while busy, cost; and what was promised
drawing     the same over time, as an SVG
"""
