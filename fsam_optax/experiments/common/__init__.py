"""What every room of the experiments needs: flags, files, statistics, bars."""
