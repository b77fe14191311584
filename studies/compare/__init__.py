"""The comparison: NIRVANA and its rivals under one protocol, as a leaderboard."""
