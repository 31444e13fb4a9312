"""Pilot: federated multimodal instruction tuning as a Flower app.

The map of the package, layer by layer; a module imports only what stands above it::

    errors                             typed errors for all that comes from outside
    checks                             ranges and names, checked in the user's own words
    wording                            words for people: reasons, durations, sizes
    settings.model                     the base model's settings
    settings.data                      the data's settings
    settings.strategy                  the server's settings
    settings.privacy                   what differential privacy is asked for
    settings.together                  settings that only go together
    settings.pilot                     every setting's type, default and range
    config                             conf/ and overrides, composed into settings
    submission                         what is handed to Flower: folders, quoting, resources
    federation_file                    a user's own federation, as overrides
    storage.run_identity               which settings stay the same when a run is resumed
    storage.locks                      one process at a time in a run folder

    losses                             the three auxiliary losses
    connector                          stage 1 and stage 2 (CT-MoA)
    arrays                             passes over the named arrays of several clients
    distances                          distances between clients, however close they are
    aggregation                        task-aware average, adaptive text-adapter aggregation
    server_optimizer                   FedAdam: an average as a step of Adam
    exact                              FedEx-LoRA: what a mean of factors leaves out
    norms                              norms of updates, and a bound that a minority cannot move
    metrics.score                      what a metric is
    metrics.text                       an answer's text against its references
    metrics.vqa                        soft accuracy against ten annotators
    metrics.grounding                  boxes, by intersection over union
    metrics.ptb                        Penn Treebank tokens, by Java or nearly so
    metrics.captions                   CIDEr-D, BLEU-4, ROUGE-L
    metrics.table                      every metric by its name
    model.shipped                      checkpoints that come with the package

    data.examples                      an example and its turns
    data.digit_questions               the demo's questions and answers
    data.digit_style                   the demo's styles, one per client
    data.digits                        the demo's scans and clients
    data.rows                          rows of a JSON array or JSONL file, read one at a time
    data.image_files                   images in a client's folder, and nowhere else
    data.llava                         LLaVA's JSON rows as examples
    data.conversion                    annotation files entry by entry, rows as LLaVA has them
    data.from_vqa                      GQA, OCR-VQA, VQAv2, TextVQA, ScienceQA
    data.from_captions                 COCO's captions
    data.from_boxes                    boxes with an expression
    data.convert                       a data set's own files as LLaVA JSONL
    data.partition                     rows dealt out to clients by Flower's partitioners
    data.files                         which files a client has, and which rows are its own
    data.screening                     which rows can be used, found before a training
    data.chat_template                 a conversation as text, and where its answers are
    data.collator                      examples to batches of token ids
    data.federation                    who the clients are, and which examples each has
    data.pooled                        the training data of all clients in one place
    data.check                         all that can be known about rows before a training

    model.parameters                   which parameter is trained, sent, private or frozen
    model.architectures                what differs between base architectures
    model.base                         the base model as its checkpoint has it
    model.lora                         the LoRA in the language model
    model.pilot_model                  the base model with Pilot's adapters, and its stages
    model.warm                         the one base model that a process keeps
    model.initial                      what the server starts from, without loading the base
    storage.tensors                    tensors on disk, whole or not at all
    storage.private_state              what never leaves a client, one file per exchange
    storage.checkpoint_folders         which checkpoints there are, and which are kept
    storage.checkpoint                 the server's checkpoints, whole or refused
    client.personal                    a client's personalised model, put together
    model.features                     the frozen vision tower's features, kept
    storage.provenance                 commit and versions that a run was made by
    storage.run_folder                 what a run leaves behind
    storage.interrupted                events of a run that died, moved aside

    client.privacy                     clipping and noise on a client's upload
    client.privacy_account             what a client has spent of (ε, δ)
    client.privacy_demands             what a site demands of a run's privacy
    model.memory                       GPU memory of a training step, from shapes
    model.layout                       shapes of what is sent and of what is kept
    model.plan                         what a run trains, sends and needs
    client.accumulation                an optimizer step's loss and gradients, in micro-batches
    client.proximal                    a pull back to what was sent (FedProx, Ditto)
    client.training                    local training of one client
    client.evaluation                  greedy generation and its score

    client.kit                         a client's place, data and tokenizer
    client.ditto                       a personal model beside the shared one
    client.turn                        one client's turn: evaluate, then train
    server.rules                       which uploads are averaged, and with which weights
    server.tensor_check                whether an upload's tensors are those asked for
    server.state                       what the server knows, and how a round changes it
    server.norm_check                  updates above a bound: warn, clip or reject
    server.claims                      which node is which client
    model.weights_sample               a base model's weights, told apart by a sample
    flower.identity                    what server and clients have in common, as hashes
    client.node_config                 a node's own words: who it is, where its data are
    client.readiness                   what a site can know to be wrong before any training
    client.site                        who and where a client is
    server.tables                      timeline and scores, from the run's events
    launching.tail                     lines and events of a growing file
    launching.progress                 events as live lines of text
    server.announcements               progress and verdict in the ServerApp's log
    storage.resume                     a run folder, begun or gone on in

    results.answering                  conversations in, answers out
    results.conversation               a conversation with a model
    results.changes                    a run's settings, some of them different now
    results.runs                       a run folder, opened to use what came out of it
    results.questions                  a file of rows to be answered
    results.scoring                    scores per client, per task, and their mean
    results.standalone.modeling_pilot  what loads an exported model; copied into it
    results.standalone.modeling_wide   a wider projector; copied into a merged model
    results.exporting                  a model as a folder that loads without this package
    results.merging                    a stage-1 model as one checkpoint
    results.model_card                 what an exported model says of itself
    report.live                        TensorBoard and Weights & Biases
    report.drawing                     panels, figures and their style
    report.fitting                     names that fit into a panel, legends below it
    report.gather                      a run's folder, put in order for figures
    report.method                      what a run's method does, in words
    report.curves                      learning curves per task and client
    report.diagram                     the time line, drawn
    report.losses                      losses by part
    report.matrices                    distances and mixing weights between clients
    report.traffic                     bytes and seconds of every exchange
    report.router                      which expert each visual token goes to
    report.page                        a report as one HTML page and PNG files
    report.run_report                  the report of a run

    flower.codec                       named tensors as Flower's arrays
    flower.wire                        the messages to clients, and the roster's
    flower.replies                     what clients send back
    flower.failures                    what a Flower error reply means
    flower.in_process                  a grid whose clients answer in this process
    flower.grid                        replies as they come
    server.roster                      who takes part in an exchange
    server.trainers                    who trains, who only evaluates
    server.journal                     events of a run, written at once
    server.exchange_loop               the loop over exchanges, begun anywhere
    strategy                           the server's strategy
    client_app                         Flower's ClientApp
    server_app                         Flower's ServerApp

    launching.outcome                  whether a run succeeded, and if not, why
    launching.processes                the processes of one launch, all ended
    launching.cluster                  which Ray cluster, and what it offers
    launching.cluster_survey           a look at a Ray cluster, in a process of its own
    launching.cluster_nodes            whether every node can run a run's clients
    launching.simulation               a run under Flower's simulation engine
    launching.restarts                 a run gone on with, by the user's word or by itself
    launching.preparation              a run before it begins: checked, made whole
    launching.in_process               a run in this process
    launching.execution                a prepared run, carried out by its engine
    sweeping.plan                      what a sweep's jobs are
    sweeping.folder                    the folder of a sweep, from which it can go on
    sweeping.rows                      results.csv, one row per job
    sweeping.job                       one job of a sweep
    sweeping.statistics                means with intervals, paired tests
    sweeping.table                     methods of sweeps compared
    sweeping.writing                   that as Markdown or LaTeX
    sweeping.multirun                  a sweep as a Hydra multirun
    launching.connections              the SuperLinks that Flower's config.toml names
    launching.remote                   a run on a SuperLink that is already there
    commands.superlink                 ``pilot-flwr run --superlink``
    commands.run                       ``pilot-flwr run``
    commands.sweep                     ``pilot-flwr sweep``
    commands.plan                      ``pilot-flwr plan``
    commands.arguments                 what the commands that use a run have in common
    commands.table                     ``pilot-flwr table``
    commands.evaluate                  ``pilot-flwr evaluate``
    commands.predict                   ``pilot-flwr predict``
    commands.chat                      ``pilot-flwr chat``
    commands.export                    ``pilot-flwr export``
    report.sweep_labels                names of a sweep's lines, as short as they can be
    report.sweep_dots                  a dot for every seed
    report.sweep_curves                learning curves of methods
    report.sweep_report                the report of a sweep
    commands.report                    ``pilot-flwr report``
    commands.convert                   ``pilot-flwr data convert``
    commands.check                     ``pilot-flwr data check``
    commands.data                      ``pilot-flwr data``, of those
    cli                                the command line tool

"Pilot: Building the Federated Multimodal Instruction Tuning Framework",
Xiong et al., AAAI 2025, arXiv 2501.13985, is "the paper" in every docstring.
"""

__version__ = "0.1.0"
