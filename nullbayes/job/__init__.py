"""A model and its data in a Python file, for the command line: ``file`` reads it, ``running`` does what is asked."""

from nullbayes.job.file import Job as Job
from nullbayes.job.file import read_job as read_job
