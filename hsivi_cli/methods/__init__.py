"""Methods: each trains a chain along a bridge towards a target, behind the verbs init / step / sample / state_dict."""
