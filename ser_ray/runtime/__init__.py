"""What stands between the verbs and Ray: the cluster and its nodes, the plan of a run, how data reach workers."""
