from som.training.command_line import main

raise SystemExit(main())
