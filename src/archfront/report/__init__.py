"""The self-contained HTML report on a job."""
