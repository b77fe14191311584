"""Pipeline steps: each reads artifacts, calls `nirvana`, writes artifacts. This file holds none of it."""
