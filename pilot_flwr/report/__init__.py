"""What a run or a sweep left behind, as one HTML page and PNG files; live logs of a run."""
