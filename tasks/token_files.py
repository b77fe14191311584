"""The one reader of the files of token ids that sample_pool writes."""

import functools

from nirvana.calibration import stored_ids

read_ids = functools.partial(stored_ids, remedy="run `dvc repro sample_pool` to make it anew")
